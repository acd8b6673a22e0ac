"""Pure parts of the server: the choice of tokens, text from tokens, stop strings, turns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast, TemperatureLogitsWarper, TopPLogitsWarper

from dlp_deploy.serving.codec import Codec
from dlp_deploy.serving.decoding import Busy, Turns
from dlp_deploy.serving.sampling import Sampling, choose_token, likelihood, nucleus, probabilities
from dlp_deploy.serving.text import INCOMPLETE, Detokenizer, StopStrings

# --- sampling ---

LOGITS = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).normal(0, 3, 300).astype("f4")
)


@given(logits=LOGITS)
def test_temperature_zero_is_greedy_whatever_the_rest(logits: np.ndarray) -> None:
    random = np.random.default_rng(0)
    assert choose_token(logits, Sampling(0, 0.1), random) == logits.argmax()
    for sampling in (Sampling(1, 0), Sampling(1e-300, 1)):
        assert choose_token(logits, sampling, random) == logits.argmax()


@given(logits=LOGITS, temperature=st.floats(0.1, 2), top_p=st.floats(0.01, 0.999))
def test_the_nucleus_is_that_of_transformers(logits: np.ndarray, temperature: float, top_p: float) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits).double()[None])
    kept = TopPLogitsWarper(top_p)(None, scores)[0].isfinite().numpy()
    shares = probabilities(logits, temperature)
    tokens, chosen = nucleus(shares, top_p)
    differing = kept.copy()
    differing[tokens] ^= True
    # At the very edge, sums in another order may fall on the other side.
    assert differing.sum() <= 1
    edge = np.abs(np.sort(shares)[::-1].cumsum() - top_p).min()
    assert not differing.any() or edge < 1e-9
    np.testing.assert_array_equal(chosen, shares[tokens])
    assert (np.diff(chosen) <= 0).all()


def test_equal_logits_and_extreme_ones_have_a_nucleus() -> None:
    even = probabilities(np.zeros(49152, "f4"), 1.0)
    assert len(nucleus(even, 0.0)[0]) == 1
    assert len(nucleus(even, 0.5)[0]) == pytest.approx(49152 / 2, abs=1)
    steep = probabilities(np.array([-1e38, 1e38, 0], "f4"), 5e-324)
    np.testing.assert_array_equal(steep, [0, 1, 0])


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([0.5, 0.05, 0.3, 0.15], "f4"))
    random = np.random.default_rng(0)
    for sampling, expected in [
        (Sampling(1, 1), [0.5, 0.05, 0.3, 0.15]),
        (Sampling(1, 0.7), [0.625, 0, 0.375, 0]),
        (Sampling(0.5, 1), np.array([0.25, 0.0025, 0.09, 0.0225]) / 0.365),
    ]:
        drawn = [choose_token(logits, sampling, random) for _ in range(20_000)]
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, expected, atol=0.012)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        choose_token(np.array([0, bad], "f4"), Sampling(), np.random.default_rng(0))


@given(logits=LOGITS, token=st.integers(0, 299), most=st.sampled_from([0, 1, 5, 400]))
def test_likelihoods_are_the_log_softmax_of_torch(logits: np.ndarray, token: int, most: int) -> None:
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    found = likelihood(logits, token, most)
    assert (found.token, len(found.likeliest)) == (token, min(most, 300))
    assert found.logprob == pytest.approx(float(expected[token]), rel=1e-9)
    for other, logprob in found.likeliest:
        assert logprob == pytest.approx(float(expected[other]), rel=1e-9)
    best = expected.topk(min(most, 300)).values.tolist()
    assert [logprob for _, logprob in found.likeliest] == pytest.approx(best, rel=1e-9)


# --- text from tokens ---


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A BPE with byte fallback and spaces as in the tokenizers of Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the hat " * 20], trainer)
    # Trained as special to keep their places, but they are ordinary tokens.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    return Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="module")
def byte_level(tiny_tokenizer: Any) -> Tokenizer:
    return tiny_tokenizer.backend_tokenizer


def pieces(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(lambda some: tokenizer.decode(list(some)), before)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


TEXTS = st.text(max_size=40) | st.text(alphabet="the cat sät 世界😀  \n", max_size=40)


@given(text=TEXTS)
def test_pieces_of_any_text_join_to_it(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode(text).ids
        given = pieces(tokenizer, ids)
        assert "".join(given) == tokenizer.decode(ids)
        if INCOMPLETE not in text and "<" not in text:
            assert "".join(given) == text
            assert not any(INCOMPLETE in piece for piece in given)
            assert given[-1] == ""


@given(ids=st.lists(st.integers(0, 511), max_size=60))
def test_pieces_of_any_bytes_join_to_what_they_decode_to(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids)


@given(text=TEXTS, place=st.integers(0, 60))
def test_a_text_that_continues_keeps_its_first_space(
    byte_level: Tokenizer, sentencepiece: Tokenizer, text: str, place: int
) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode("the cat" + text).ids
        split = min(place, len(ids))
        prompt = tokenizer.decode(ids[:split])
        if not prompt.endswith(INCOMPLETE):
            joined = prompt + "".join(pieces(tokenizer, ids[split:], ids[:split]))
            assert joined == tokenizer.decode(ids)


def test_a_space_survives_behind_a_token_without_text(sentencepiece: Tokenizer) -> None:
    end = sentencepiece.token_to_id("</s>")
    ids = [*sentencepiece.encode("the cat").ids, end, end, *sentencepiece.encode("sat").ids]
    assert "".join(pieces(sentencepiece, ids)) == sentencepiece.decode(ids) == "the cat sat"


def test_a_character_comes_when_its_last_byte_does(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode("a😀b").ids
        assert [piece for piece in pieces(tokenizer, ids) if piece] == ["a", "😀", "b"]


def test_a_token_alone_has_the_text_that_it_adds(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer, text in ((byte_level, "the cat  sat 1é"), (sentencepiece, " the cat  sat 1")):
        codec = Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), frozenset(), 512)
        ids = tokenizer.encode(text.lstrip()).ids
        texts = [codec.text_of(token) for token in ids]
        assert "".join(texts).rstrip(INCOMPLETE) == text.rstrip("é")


# --- stop strings ---


def cut(text: str, stops: Sequence[str]) -> str:
    """All of `text` before the first stop string to be complete, of several that end there the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))]
    return text


@settings(max_examples=300)
@given(
    parts=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_however_it_comes(parts: list[str], stops: list[str]) -> None:
    watch = StopStrings(stops)
    given = "".join(watch.push(part) for part in parts)
    given += watch.finish()
    assert given == cut("".join(parts), stops)
    assert watch.found == any(stop in "".join(parts) for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    watch = StopStrings(["\n\nUser:"])
    assert [watch.push(part) for part in ("Hi", "!\n", "\nUs", "ed", "\n\nUser", ":", " more")] == [
        "Hi", "!", "", "\n\nUsed", "", "", "",
    ]  # fmt: skip
    assert watch.found
    assert watch.finish() == ""


# --- turns ---


def test_turns_are_taken_in_order_and_one_too_many_is_refused() -> None:
    async def run() -> list[int]:
        turns, order = Turns(waiting=3), []
        gate = asyncio.Event()

        async def take(number: int) -> None:
            async with turns.turn():
                await gate.wait()
                order.append(number)

        tasks = [asyncio.create_task(take(number)) for number in range(4)]
        await asyncio.sleep(0)
        assert turns.waiting == 3
        with pytest.raises(Busy):
            await take(9)
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        tasks.append(asyncio.create_task(take(4)))
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert turns.waiting == 0
        return order

    assert asyncio.run(run()) == [0, 2, 3, 4]
