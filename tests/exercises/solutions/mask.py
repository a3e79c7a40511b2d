"""The mask: which tokens of a conversation are targets. A copy of parrot/chat.py, pieces_of.

Write the pieces of an assistant's turn after its <|im_start|>: what is only read, and what the
model is to say. It must also learn to stop.
"""

from parrot.chat import IM_END, IM_START, text_of


def pieces_of(messages):
    """Messages -> [(text or Control, whether its tokens are targets)]: the template itself."""
    pieces = []
    for message in messages:
        pieces.append((IM_START, False))
        if message["role"] == "assistant" and "weight" not in message:  # 0: it is only read
            pieces += [("assistant\n", False), (text_of(message), True), (IM_END, True)]
        else:
            pieces += [(f"{message['role']}\n{text_of(message)}", False), (IM_END, False)]
        pieces.append(("\n", False))
    return pieces
