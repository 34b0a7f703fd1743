"""Llama's `tokenizer.model`, a SentencePiece file, as tokenizer.json."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers

import common


def find_merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The merges of a BPE tokenizer, in the order in which they apply.

    pieces: the vocabulary by id; scores: of each piece, the higher the earlier it is formed.  Every
    way to cut a piece into two others is a merge; ties are broken by both parts' ids."""
    rank = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for word, i in rank.items():
        for at in range(1, len(word)):
            left, right = word[:at], word[at:]
            if left in rank and right in rank:
                merges.append((-scores[i], rank[left], rank[right], (left, right)))
    return [merge[-1] for merge in sorted(merges)]


def convert_tokenizer(path: Path) -> str:
    """A SentencePiece BPE model -> the text of a tokenizer.json that gives the same ids"""
    try:
        from sentencepiece import SentencePieceProcessor  # pip install sentencepiece
    except ImportError:
        common.fail(f"{path}: reading it needs sentencepiece (pip install sentencepiece)")
    model = SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    scores = [model.get_score(i) for i in range(len(model))]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            find_merges(pieces, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # The official tokenizer drops blanks beside these two.
    tokenizer.add_special_tokens(
        [AddedToken(word, lstrip=True, rstrip=True, normalized=False) for word in ("<s>", "</s>")]
    )
    return tokenizer.to_str()
