"""Instruction + image + answer -> one row of tokens, and the tokenizers that read the words."""

import re
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from common import fail, is_main_process, latest, refuse
from data import is_text, random_shift, to_float
from model import ACTION, END_OF_IMAGE, LATENT, TEXT, VISION

PAD, BOS, EOS = 0, 1, 2
OFFICIAL_TEMPLATE = (
    "<s> You are a helpful assistant. USER: What action should the robot take to "
    "`{instruction}` ASSISTANT:"
)
TAGS = {LATENT: ("<delta>", "</delta>"), ACTION: ("<action>", "</action>"), TEXT: ("", "")}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<vision>", "</vision>", *TAGS[LATENT], *TAGS[ACTION]]


def train_tokenizer(texts):
    """A word-level tokenizer over all words of `texts`, lower case; tags are words of their own"""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def dataset_tokenizer(dataset):
    """DATASET/tokenizer.json where there is one, else words of the dataset's own instructions"""
    if (dataset.path / "tokenizer.json").is_file():
        return read_tokenizer(dataset.path)
    return train_tokenizer(
        [
            text
            for e in dataset.episodes
            for text in (e.instruction, *(e.info.get("captions") or ()))
        ]
    )


def read_tokenizer(folder):
    """tokenizer.json of a dataset or of a checkpoint of stage 2 or 3, in the library's format"""
    path = latest(folder) / "tokenizer.json"
    with refuse(f"{path}: no tokenizer", Exception):  # the library raises nothing more precise
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))


def opening_tags(tokenizer):
    """Vocabulary -> the token behind which its answers begin; refuses a tokenizer that spells it"""
    tags = {kind: tokenizer.token_to_id(TAGS[kind][0]) for kind in (LATENT, ACTION)}
    if None in tags.values():
        fail("--like_tag: the tokenizer has no token for <delta> or <action>")
    return tags


class NoKnownWord(ValueError):
    """Text that a tokenizer cannot read"""


class Sequences:
    """Instruction + image + answer -> one row of tokens (official layout, docs/formats.md).

    bos, text, <vision> image </vision>, <delta> codes </delta>, eos.  An answer is latent codes
    (`<delta>`), action bins (`<action>`) or plain text (a caption, no tags).  `length`: cut or pad
    training rows to it (0: pad to the longest); official_cut moves their mask one step too far."""

    def __init__(
        self, tokenizer, image_tokens, template="{instruction}", length=0, official_cut=False
    ):
        self.tokenizer, self.image_tokens, self.template = tokenizer, image_tokens, template
        self.length, self.official_cut = length, official_cut
        self.said = set()  # unknown words that have been named
        self.words = lru_cache(maxsize=65536)(
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids if text else []
        )
        with refuse("--template: expected words around {instruction}", (ValueError, LookupError)):
            template.format(instruction="\0").index("\0")

    def prompt(self, instruction, kind):
        """-> (tokens, kinds) up to where the answer begins"""
        opening = [
            BOS,
            *self.words(self.template.format(instruction=instruction)),
            *self.words("<vision>"),
        ]
        closing = [*self.words("</vision>"), *self.words(TAGS[kind][0])]
        return opening + [0] * self.image_tokens + closing, [TEXT] * len(opening) + [
            VISION
        ] * self.image_tokens + [TEXT] * len(closing)

    def unknown_words(self, text, tags=False):
        """-> the words of a text that the tokenizer reads as <unk>; whether it knows any other.
        Raises NoKnownWord for text that is none or, unless `tags`, holds a token of control."""
        if not is_text(text):
            raise NoKnownWord(f"expected words, found {text!r}")
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        unknown, known = [], False
        for token, (start, end) in zip(encoding.tokens, encoding.offsets):
            word = text[start:end]
            if token == "<unk>":
                unknown.append(word)
            elif token in SPECIAL and not tags:
                raise NoKnownWord(f"{text!r} holds {token}, which is no word")
            elif re.search(r"\w", word):
                known = True
        return unknown, known

    def check(self, episodes, answers, kind):
        """Before training: refuse a dataset of which the tokenizer knows no word, and rows that
        `length` leaves without an answer; say once what words are unknown and what rows are cut.

        answers: of each episode an int array [T, n], or T captions"""
        if self.length:
            self.check_length(episodes, answers, kind)
        self.check_words([e.instruction for e in episodes])
        if kind == TEXT:
            captions = [text for rows in answers for text in rows if text.strip()]
            self.check_words(captions, tags=True)

    def check_length(self, episodes, answers, kind):
        lost, needed, cut, first = [], 0, 0, None
        for e, rows in zip(episodes, answers):
            prompt = len(self.prompt(e.instruction, kind)[0])
            if kind == TEXT:  # the end of text is part of a caption
                counts = np.array([len(self.words(caption)) + 1 for caption in rows])
                whole = prompt + counts
            else:
                counts = np.full(len(rows), rows.shape[1])
                whole = prompt + counts + len(self.words(TAGS[kind][1])) + 1
            needed = max(needed, whole.max() - 1)  # the first token is no target
            if prompt + self.official_cut > self.length:  # whose mask ends one token earlier
                lost.append(e.id)
            elif count := int((whole > self.length + 1).sum()):
                cut, first = cut + count, first or e.id
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            fail(
                f"--length {self.length}: no room for an answer after the prompt of episodes "
                f"{', '.join(map(repr, lost[:3]))}{more} (whole rows take up to {needed} tokens)"
            )
        if cut and is_main_process():
            print(
                f"--length {self.length} cuts the end of {cut} rows (first: episode {first!r}; "
                f"whole rows take up to {needed} tokens)"
            )

    def check_words(self, texts, tags=False):
        """Say once which words the tokenizer does not know.  Raises NoKnownWord if it knows none"""
        unknown, any_known = {}, False
        for text in dict.fromkeys(texts):
            words, known = self.unknown_words(text, tags)
            unknown.update(dict.fromkeys(words))
            any_known = any_known or known
        if not any_known:
            text = next(iter(texts), "")
            shown = repr(text if len(text) < 60 else text[:60] + " ..")
            raise NoKnownWord(f"the tokenizer knows none of the words in {shown}")
        fresh = [repr(word) for word in unknown if word not in self.said]
        self.said.update(unknown)
        if fresh and is_main_process():
            more = f" and {len(fresh) - 10} more" if len(fresh) > 10 else ""
            print(f"words unknown to the tokenizer (read as <unk>): {', '.join(fresh[:10])}{more}")

    def rows(self, instructions, answers, kind, codes=None):
        """Training rows, right-padded (with id 1, as official) and shifted by one.

        answers: int [B, n] codes or bins, or B strings; codes: int64 [B, N] of the images.  ->
        tensors [B, L]: tokens, kinds (inputs), targets, target_kinds, mask (answer, tags, eos)."""
        opening, closing = (self.words(tag) for tag in TAGS[kind])
        built = []
        for instruction, answer in zip(instructions, answers):
            tokens, kinds = self.prompt(instruction, kind)
            begin = len(tokens) - len(opening)
            answer = self.words(answer) if kind == TEXT else [int(a) for a in answer]
            tokens = tokens + answer + closing + [EOS]
            kinds = kinds + [kind] * len(answer) + [TEXT] * (len(closing) + 1)
            mask = [0] * begin + [1] * (len(tokens) - begin)
            if self.official_cut and len(tokens) > self.length + 1:
                mask[: self.length + 1] = mask[1 : self.length + 1] + [0]
            # The last token, which no input needs, is padding there.
            built.append(torch.tensor([tokens[:-1] + [BOS], tokens, kinds, mask]))
        length = self.length + 1 if self.length else max(row.shape[1] for row in built)
        full = torch.tensor([BOS, BOS, TEXT, 0])[:, None, None].repeat(1, len(built), length)
        for i, row in enumerate(built):
            full[:, i, : row.shape[1]] = row[:, :length]
        if codes is not None:
            full[:2] = put_codes(full[:2], full[2], codes)
        inputs, targets, kinds, mask = full
        return {
            "tokens": inputs[:, :-1],
            "kinds": kinds[:, :-1],
            "targets": targets[:, 1:],
            "target_kinds": kinds[:, 1:],
            "mask": mask[:, 1:].bool(),
        }

    def batch(self, episodes, answers, kind, which, device):
        """`rows` of frames which [(episode index, t), ..], with their codes or else their pictures:
        images float [B, 3, S, S] in [-1, 1].  answers: an episode's [T, n] array or T strings."""
        chosen = [episodes[e] for e, _ in which]
        stack = lambda field: np.stack([getattr(e, field)[t] for e, (_, t) in zip(chosen, which)])
        codes = None if chosen[0].codes is None else torch.from_numpy(stack("codes").astype(int))
        batch = self.rows(
            [e.instruction for e in chosen], [answers[e][t] for e, t in which], kind, codes
        )
        batch["images"] = to_float(stack("frames"), device) * 2 - 1 if codes is None else None
        return {name: x if x is None else x.to(device) for name, x in batch.items()}

    def prompts(self, instructions, kind, codes=None, multiple=1):
        """Prompts for generation, left-padded to the longest, or more to a multiple: tokens, kinds
        int64 [B, L], valid bool [B, L].  codes: int64 [B, N] of the images."""
        built = [self.prompt(text, kind) for text in instructions]
        length = -(-max(len(tokens) for tokens, _ in built) // multiple) * multiple
        tokens = torch.tensor([[PAD] * (length - len(t)) + t for t, _ in built])
        kinds = torch.tensor([[TEXT] * (length - len(k)) + k for _, k in built])
        valid = torch.tensor([[False] * (length - len(t)) + [True] * len(t) for t, _ in built])
        return tokens if codes is None else put_codes(tokens, kinds, codes), kinds, valid


def put_codes(tokens, kinds, codes):
    """tokens, kinds [B, L], codes [B, N] -> tokens with codes and END_OF_IMAGE where vision is"""
    image = torch.cat((codes, torch.full_like(codes[:, :1], END_OF_IMAGE)), dim=1)
    vision = kinds == VISION
    return torch.where(vision, image.gather(1, (vision.cumsum(1) - 1).clamp(min=0)), tokens)


def augment(batch, share, vqgan, *part):
    """Move a batch's pictures by random offsets (wherever a camera looks, the motion is the same);
    a VQGAN then reads them anew.  At share 0 the batch as it is; part: see random_shift."""
    if not share:
        return batch
    images = random_shift(batch["images"], share, *part)
    if vqgan is None:
        return {**batch, "images": images}
    codes = vqgan.encode(images)
    return {**batch, "images": None, "tokens": put_codes(batch["tokens"], batch["kinds"], codes)}
