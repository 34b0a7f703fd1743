"""Instruction + image + answer -> one row of tokens, and the tokenizers that read the words.

The layout of a row is the official one: docs/formats.md, "Token rows"."""

import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from common import fail, is_main_process, latest, refuse
from data import Dataset, Episode, ImageTokenizer, is_text, random_shift, to_float
from model import ACTION, END_OF_IMAGE, LATENT, TEXT, VISION

PAD, BOS, EOS = 0, 1, 2  # as in the Llama tokenizer; SPECIAL gives ours the same ids
ROW_PADDING = BOS  # official rows are padded with id 1, prompts with 0 (docs/formats.md)
OFFICIAL_TEMPLATE = (
    "<s> You are a helpful assistant. USER: What action should the robot take to "
    "`{instruction}` ASSISTANT:"
)
TAGS = {LATENT: ("<delta>", "</delta>"), ACTION: ("<action>", "</action>"), TEXT: ("", "")}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<vision>", "</vision>", *TAGS[LATENT], *TAGS[ACTION]]

Answers = np.ndarray | Sequence[str]  # of one episode: int [T, n] codes or bins, or T captions


# ------------------------------------------------------------------------ tokenizers
def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A word-level tokenizer over all words of `texts`, in lower case; each tag is one token"""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def dataset_tokenizer(dataset: Dataset) -> Tokenizer:
    """DATASET/tokenizer.json if it exists, else one over the dataset's instructions and captions"""
    if (dataset.path / "tokenizer.json").is_file():
        return read_tokenizer(dataset.path)
    texts = []
    for episode in dataset.episodes:
        texts.append(episode.instruction)
        texts.extend(episode.info.get("captions") or ())
    return train_tokenizer(texts)


def read_tokenizer(folder: str) -> Tokenizer:
    """tokenizer.json of a dataset or of a checkpoint of stage 2 or 3, in the library's format"""
    path = latest(folder) / "tokenizer.json"
    with refuse(f"{path}: no tokenizer", Exception):  # the library raises nothing more precise
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))


def opening_tags(tokenizer: Tokenizer) -> dict[int, int]:
    """Vocabulary (LATENT, ACTION) -> id of the tag that opens its answers.  Refuses a tokenizer
    that splits these tags into several tokens, as Llama's does."""
    tags = {kind: tokenizer.token_to_id(TAGS[kind][0]) for kind in (LATENT, ACTION)}
    if None in tags.values():
        fail("--like_tag: the tokenizer has no token for <delta> or <action>")
    return tags


class NoKnownWord(ValueError):
    """Text that a tokenizer cannot read"""


def unknown_words(
    tokenizer: Tokenizer, text: str, allow_tags: bool = False
) -> tuple[list[str], bool]:
    """-> the words of a text that the tokenizer reads as <unk>, and whether it knows any other.

    Raises NoKnownWord for what is not text and, unless `allow_tags`, for text that contains a
    control token such as </s>."""
    if not is_text(text):
        raise NoKnownWord(f"expected words, found {text!r}")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    unknown, any_known = [], False
    for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
        word = text[start:end]
        if token == "<unk>":
            unknown.append(word)
        elif token in SPECIAL and not allow_tags:
            raise NoKnownWord(f"{text!r} contains the control token {token}")
        elif re.search(r"\w", word):  # punctuation alone says nothing
            any_known = True
    return unknown, any_known


# ------------------------------------------------------------------------ token rows
class Row:
    """A token row while it is built: three lists of equal length, filled segment by segment"""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.kinds: list[int] = []  # the vocabulary that each id belongs to
        self.supervised: list[bool] = []  # whether the loss counts it

    def append(self, ids: Sequence[int], kind: int = TEXT, supervised: bool = False) -> None:
        """Append a segment of tokens that share their vocabulary and their place in the loss"""
        self.ids.extend(ids)
        self.kinds.extend([kind] * len(ids))
        self.supervised.extend([supervised] * len(ids))


class Sequences:
    """Builds token rows for training and prompts for generation.

    An answer is latent codes (kind LATENT), action bins (ACTION) or a caption (TEXT).

    image_tokens: positions that an image fills, VLAConfig.image_tokens
    template: text around `{instruction}`
    length: training rows are cut or padded to it; 0: padded to the longest of their batch
    official_cut: the loss mask of cut rows is that of the official code, see official_cut_mask"""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_tokens: int,
        template: str = "{instruction}",
        length: int = 0,
        official_cut: bool = False,
    ) -> None:
        check_template(template)
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.template = template
        self.length = length
        self.official_cut = official_cut
        self.reported: set[str] = set()  # unknown words that were printed
        self.words = lru_cache(maxsize=65536)(self.encode)  # the same texts recur

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without bos and eos"""
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def prompt(self, instruction: str, kind: int, image: Sequence[int]) -> Row:
        """The row up to the tag that opens the answer; image: ids of the picture's positions"""
        row = Row()
        row.append([BOS])
        row.append(self.words(self.template.format(instruction=instruction)))
        row.append(self.words("<vision>"))
        row.append(image, VISION)
        row.append(self.words("</vision>"))
        row.append(self.words(TAGS[kind][0]), supervised=True)
        return row

    def complete_row(
        self, instruction: str, kind: int, image: Sequence[int], answer: Sequence[int] | str
    ) -> Row:
        """The whole row: prompt, answer, closing tag, eos"""
        row = self.prompt(instruction, kind, image)
        ids = self.words(answer) if kind == TEXT else [int(number) for number in answer]
        row.append(ids, kind, supervised=True)
        row.append(self.words(TAGS[kind][1]), supervised=True)
        row.append([EOS], supervised=True)
        return row

    def rows(
        self,
        instructions: Sequence[str],
        answers: np.ndarray | Sequence[Sequence[int]] | Sequence[str],
        kind: int,
        codes: Tensor | np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        """Training rows: build each row, shift it by one, cut or pad it on the right.

        "push it" with an image of two codes, 95 and 12, and the latent action 3 0 7 1, in a batch
        whose longest row has one token more.  <vis> is <vision>, <del> is <delta>; T is the text
        vocabulary, V vision, L latent:

            tokens        <s>  push it    <vis> 95 12   8193   </vis> <del> 3 0 7 1      </del> <s>
            kinds         T    T    T     T     V  V    V      T      T     L L L L      T      T
            targets       push it   <vis> 95    12 8193 </vis> <del>  3     0 7 1 </del> </s>   <s>
            target_kinds  T    T    T     V     V  V    T      T      L     L L L T      T      T
            mask          -    -    -     -     -  -    -      1      1     1 1 1 1      1      -

        answers: int [B, n] codes or bins, or B captions
        codes: int [B, N] of a VQGAN, or None if the model reads patches (its image ids are then 0)
        -> tokens, kinds, targets, target_kinds int64 [B, L], mask bool [B, L]"""
        images = self.image_ids(len(instructions), codes)
        rows = [
            self.complete_row(instruction, kind, image, answer)
            for instruction, image, answer in zip(instructions, images, answers, strict=True)
        ]
        length = self.length or max(len(row.ids) - 1 for row in rows)
        return {
            "tokens": pad_right([row.ids[:-1] for row in rows], length, ROW_PADDING),
            "kinds": pad_right([row.kinds[:-1] for row in rows], length, TEXT),
            "targets": pad_right([row.ids[1:] for row in rows], length, ROW_PADDING),
            "target_kinds": pad_right([row.kinds[1:] for row in rows], length, TEXT),
            "mask": pad_right([self.target_mask(row) for row in rows], length, False),
        }

    def image_ids(self, count: int, codes: Tensor | np.ndarray | None) -> list[list[int]]:
        """Ids at the positions of `count` images: their codes and END_OF_IMAGE, or zeros, where
        the model puts embedded patches"""
        if codes is None:
            return [[0] * self.image_tokens] * count
        return [[*image, END_OF_IMAGE] for image in codes.tolist()]

    def target_mask(self, row: Row) -> list[bool]:
        """Which targets of a row the loss counts: opening tag, answer, closing tag and eos"""
        mask = row.supervised[1:]
        if self.official_cut and 0 < self.length < len(mask):
            return official_cut_mask(mask, self.length)
        return mask

    def batch(
        self,
        episodes: Sequence[Episode],
        answers: Sequence[Answers],
        kind: int,
        samples: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> dict[str, Tensor | None]:
        """The rows of some frames, on the device.

        answers: one entry per episode; samples: B pairs (episode index, frame t)
        -> what `rows` returns, and images: float32 [B, 3, S, S] in [-1, 1], or None if the
        episodes have codes, which are then part of the rows"""
        chosen = [(episodes[e], t) for e, t in samples]
        instructions = [episode.instruction for episode, _ in chosen]
        wanted = [answers[e][t] for e, t in samples]
        codes, images = None, None
        if chosen[0][0].codes is not None:
            codes = np.stack([episode.codes[t] for episode, t in chosen])
        else:
            frames = np.stack([episode.frames[t] for episode, t in chosen])
            images = to_float(frames, device) * 2 - 1
        rows = self.rows(instructions, wanted, kind, codes)
        return {**{name: x.to(device) for name, x in rows.items()}, "images": images}

    def prompts(
        self,
        instructions: Sequence[str],
        kind: int,
        codes: Tensor | None = None,
        multiple: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts for generation, padded on the left to the longest, rounded up to a `multiple`.

        codes: int64 [B, N] of the images, or None -> tokens, kinds int64 [B, L], valid bool [B, L]
        (False: padding)"""
        images = self.image_ids(len(instructions), codes)
        rows = [
            self.prompt(instruction, kind, image)
            for instruction, image in zip(instructions, images, strict=True)
        ]
        length = math.ceil(max(len(row.ids) for row in rows) / multiple) * multiple
        tokens = pad_left([row.ids for row in rows], length, PAD)
        kinds = pad_left([row.kinds for row in rows], length, TEXT)
        valid = pad_left([[True] * len(row.ids) for row in rows], length, False)
        return tokens, kinds, valid

    # -------------------------------------------------------------------- checks before training
    def check(self, episodes: Sequence[Episode], answers: Sequence[Answers], kind: int) -> None:
        """Refuse a dataset in which the tokenizer knows no word, and rows that `length` leaves
        without an answer; print which words are unknown and how many rows are cut.

        answers: one entry per episode.  Raises NoKnownWord"""
        if self.length:
            self.check_length(episodes, answers, kind)
        self.check_words([episode.instruction for episode in episodes])
        if kind == TEXT:
            captions = [text for rows in answers for text in rows if text.strip()]
            self.check_words(captions, allow_tags=True)

    def check_length(
        self, episodes: Sequence[Episode], answers: Sequence[Answers], kind: int
    ) -> None:
        """Exit if `length` leaves an episode's rows without an answer; print how many it cuts"""
        room = self.length - int(self.official_cut)  # the official mask ends one token earlier
        no_room: list[str] = []
        cut_rows, first_cut, longest = 0, "", 0
        for episode, episode_answers in zip(episodes, answers, strict=True):
            prompt, complete = self.row_lengths(episode.instruction, episode_answers, kind)
            longest = max(longest, complete.max() - 1)  # the first token is not a target
            cut = int((complete - 1 > self.length).sum())
            if prompt > room:
                no_room.append(repr(episode.id))
            elif cut:
                cut_rows += cut
                first_cut = first_cut or episode.id
        if no_room:
            more = f" and {len(no_room) - 3} more" if len(no_room) > 3 else ""
            fail(
                f"--length {self.length}: no room for an answer after the prompt of episodes "
                f"{', '.join(no_room[:3])}{more} (complete rows take up to {longest} tokens)"
            )
        if cut_rows and is_main_process():
            print(
                f"--length {self.length} cuts the end of {cut_rows} rows (first: episode "
                f"{first_cut!r}; complete rows take up to {longest} tokens)"
            )

    def row_lengths(self, instruction: str, answers: Answers, kind: int) -> tuple[int, np.ndarray]:
        """-> tokens of an episode's prompt, and of its complete rows, int [T]"""
        prompt = len(self.prompt(instruction, kind, [0] * self.image_tokens).ids)
        if kind == TEXT:
            answer_lengths = np.array([len(self.words(caption)) for caption in answers])
        else:
            answer_lengths = np.full(len(answers), answers.shape[1])
        return prompt, prompt + answer_lengths + len(self.words(TAGS[kind][1])) + 1  # eos

    def check_words(self, texts: Sequence[str], allow_tags: bool = False) -> None:
        """Print which words the tokenizer does not know, each once.  Raises NoKnownWord if it
        knows none at all."""
        unknown: dict[str, None] = {}  # in order, each once
        any_known = False
        for text in dict.fromkeys(texts):
            words, known = unknown_words(self.tokenizer, text, allow_tags)
            unknown.update(dict.fromkeys(words))
            any_known = any_known or known
        if not any_known:
            text = next(iter(texts), "")
            shown = text if len(text) < 60 else text[:60] + " .."
            raise NoKnownWord(f"the tokenizer knows none of the words in {shown!r}")
        fresh = [repr(word) for word in unknown if word not in self.reported]
        self.reported.update(unknown)
        if fresh and is_main_process():
            more = f" and {len(fresh) - 10} more" if len(fresh) > 10 else ""
            print(f"words unknown to the tokenizer (read as <unk>): {', '.join(fresh[:10])}{more}")


def check_template(template: str) -> None:
    """Exit unless the template is text with a place for {instruction}"""
    marker = "\0"
    with refuse("--template: expected words around {instruction}", (ValueError, LookupError)):
        template.format(instruction=marker).index(marker)


def official_cut_mask(mask: list[bool], length: int) -> list[bool]:
    """The loss mask of a row that is cut to `length` targets, as the official code makes it: it
    shifts such a mask twice, so each target has the flag of the next one (LAPA's
    latent_pretraining/data.py, `_iter_pad`; deviation 14 in docs/deviations.md)"""
    return [*mask[1:length], False]


def pad_right(rows: list[list], length: int, padding: int) -> Tensor:
    """Lists, cut or padded on the right -> tensor [B, length]"""
    padded = [row[:length] + [padding] * (length - len(row)) for row in rows]
    return torch.from_numpy(np.array(padded))  # three times as fast as torch.tensor


def pad_left(rows: list[list], length: int, padding: int) -> Tensor:
    """Lists of at most `length` values, padded on the left -> tensor [B, length]"""
    padded = [[padding] * (length - len(row)) + row for row in rows]
    return torch.from_numpy(np.array(padded))


# ------------------------------------------------------------------------ random shifts
def augment(
    batch: dict[str, Tensor | None],
    share: float,
    vqgan: ImageTokenizer | None,
    global_batch: int | None = None,
    local_rows: slice = slice(None),
) -> dict[str, Tensor | None]:
    """Shift a batch's pictures at random, which changes no motion; a VQGAN then encodes them anew.

    share: largest offset as a share of the picture, 0: the batch as it is; the rest: see
    data.random_shift"""
    if not share:
        return batch
    images = random_shift(batch["images"], share, global_batch, local_rows)
    if vqgan is None:
        return {**batch, "images": images}
    tokens = put_codes(batch["tokens"], batch["kinds"], vqgan.encode(images))
    return {**batch, "images": None, "tokens": tokens}


def put_codes(tokens: Tensor, kinds: Tensor, codes: Tensor) -> Tensor:
    """tokens, kinds [B, L], codes [B, N] -> the tokens with these codes and END_OF_IMAGE at the
    positions of the image"""
    end = torch.full_like(codes[:, :1], END_OF_IMAGE)
    image = torch.cat((codes, end), dim=1)  # B, N + 1
    is_image = kinds == VISION
    place = (is_image.cumsum(dim=1) - 1).clamp(min=0)  # B, L: how far into the image
    return torch.where(is_image, image.gather(1, place), tokens)
