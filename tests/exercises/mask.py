"""The mask: which tokens of a conversation are targets. A copy of parrot/chat.py, pieces_of.

Write the pieces of an assistant's turn after its <|im_start|>: what is only read, and what the
model is to say. It must also learn to stop.
"""

from parrot.chat import IM_END, IM_START


def pieces_of(messages):
    """Messages -> [(text or Control, whether its tokens are targets)]: the template itself."""
    pieces = []
    for message in messages:
        role, text = message["role"], message["content"].strip()
        pieces.append((IM_START, False))
        if role == "assistant" and "weight" not in message:  # else it is only read
            pieces += []  # your line here
        else:
            pieces += [(f"{role}\n{text}", False), (IM_END, False)]
        pieces.append(("\n", False))
    return pieces
