"""What goes first when a conversation is too long, and what is never lost in silence."""

from parrot.chat import encode_chat
from parrot.shorten import fit, without_middle

LONG = " ".join(f"word{i}" for i in range(400))


def test_the_middle_of_the_context_goes_first(tokenizer):
    messages = [{"role": "user", "content": "Summarise.", "context": LONG}, {"role": "assistant", "content": "It counts."}]
    tokens, supervised, cut = fit(messages, tokenizer, 200)
    text = tokenizer.decode_with_control(tokens)
    assert cut == "context" and 195 <= len(tokens) <= 200
    assert "Summarise.\n\nword0 word1" in text and " … " in text and text.count("word399") == 1
    assert tokenizer.decode_with_control([t for t, s in zip(tokens, supervised) if s]) == "It counts.<|im_end|>"


def test_a_long_prompt_loses_its_middle(tokenizer):
    messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "It counts."}]
    tokens, supervised, cut = fit(messages, tokenizer, 200)
    assert cut == "context" and len(tokens) <= 200
    assert tokenizer.decode_with_control([t for t, s in zip(tokens, supervised) if s]) == "It counts.<|im_end|>"


def test_a_reply_that_alone_is_too_long_loses_its_end_and_its_stop_token(tokenizer):
    messages = [{"role": "user", "content": "Count.", "context": "Slowly."}, {"role": "assistant", "content": LONG}]
    tokens, supervised, cut = fit(messages, tokenizer, 100)
    learned = [t for t, s in zip(tokens, supervised) if s]
    assert cut == "reply" and len(tokens) == 100
    assert tokenizer.control("<|im_end|>") not in learned
    assert tokenizer.decode(learned).startswith("word0 word1")
    assert "Count." in tokenizer.decode(tokens) and "Slowly." not in tokenizer.decode(tokens)


def test_what_fits_is_left_alone(tokenizer):
    messages = [{"role": "user", "content": "Hi", "context": "there"}, {"role": "assistant", "content": "Ho"}]
    whole = encode_chat(messages, tokenizer)
    assert fit(messages, tokenizer, len(whole[0])) == (*whole, "")


def test_without_middle_keeps_both_ends():
    for count in range(1, 12):
        front, _, back = without_middle("0123456789", count).partition(" … ")
        assert len(front + back) == min(count, 10) and abs(len(front) - len(back)) <= (1 if count < 10 else 10)
        assert "0123456789".startswith(front) and "0123456789".endswith(back)


def test_several_long_turns_all_lose_their_middle_before_a_reply_loses_its_end(tokenizer):
    messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "One."},
                {"role": "user", "content": LONG}, {"role": "assistant", "content": "Two."}]
    tokens, supervised, cut = fit(messages, tokenizer, 700)
    assert cut == "context" and 690 <= len(tokens) <= 700
    assert tokenizer.decode_with_control([t for t, s in zip(tokens, supervised) if s]) == "One.<|im_end|>Two.<|im_end|>"
