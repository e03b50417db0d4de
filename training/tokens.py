"""The tokenizer: byte-pair encoding in CLIP's format, each of our words one token.

Words outside our grammar still work: they fall apart into known pieces, in the end bytes.
"""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import regex
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from gpuctl_demo import scenes

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
Word = tuple[str, ...]
Pair = tuple[str, str]


def build(folder: Path) -> CLIPTokenizer:
    """Writes the tokenizer's files into the folder and loads it from there."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges(_words())
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [letter + END_OF_WORD for letter in letters]
    vocabulary = [*pieces, *("".join(pair) for pair in merges), START, END]
    ids = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=scenes.LONGEST_TEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _words() -> list[str]:
    """Every word that a caption or an instruction can hold."""
    rng = random.Random(0)
    texts = [scenes.caption(scene, rng).text for scene in scenes.all_scenes()]
    for category in scenes.ATTRIBUTES:
        texts += [edit.instruction for edit in scenes.edits(category, 300, 0)]
    return sorted(set(regex.findall(r"\p{L}+", " ".join(texts))))


def _merges(words: list[str]) -> list[Pair]:
    """Joins the most frequent pair of pieces until every word is whole."""
    pieces: list[Word] = [(*word[:-1], word[-1] + END_OF_WORD) for word in words]
    merges: list[Pair] = []
    while pairs := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_join(word, best) for word in pieces]
    return merges


def _join(word: Word, pair: Pair) -> Word:
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)
