"""Token rows, prompts, tokenizers, and the checks of answers and words before training."""

import re

import numpy as np
import pytest
import torch

import data
import sequences
from model import ACTION, END_OF_IMAGE, LATENT, TEXT, VISION

BUILDER = sequences.Sequences(
    sequences.train_tokenizer(["push red block", "star"]), 2, "do {instruction}"
)


def ids_of(text):
    """Words (and digits, which stand for themselves) -> token ids"""
    return [int(w) if w.isdigit() else BUILDER.tokenizer.token_to_id(w) for w in text.split()]


def make_episode(instruction, name="a"):
    return data.Episode(name, instruction, 5, {}, np.zeros((2, 8, 8, 3), np.uint8))


# ---------------------------------------------------------------- rows
@pytest.mark.parametrize(
    "kind, answers, endings",
    [
        (LATENT, [[5, 1], [0, 7]], ("<delta> 5 1 </delta> </s>", "<delta> 0 7 </delta> </s>")),
        (ACTION, [[5, 1], [0, 7]], ("<action> 5 1 </action> </s>", "<action> 0 7 </action> </s>")),
        (TEXT, ["red star", "star"], ("red star </s>", "star </s>")),
    ],
)
def test_rows_match_rows_built_by_hand(kind, answers, endings):
    batch = BUILDER.rows(["push red", "block"], answers, kind)
    prompts = [f"<s> <unk> {text} <vision> 0 0 </vision> " for text in ("push red", "block")]
    complete = [ids_of(prompt + ending) for prompt, ending in zip(prompts, endings, strict=True)]
    length = len(complete[0])
    for i, prompt_length in enumerate((8, 7)):
        tokens = complete[i] + [sequences.BOS] * (length - len(complete[i]))
        kinds = [TEXT] * (prompt_length - 3) + [VISION] * 2
        kinds += [TEXT] * (length - len(kinds))
        if kind != TEXT:
            kinds[prompt_length + 1 : prompt_length + 3] = [kind] * 2
        answer = range(prompt_length, len(complete[i]))  # tags, codes and eos
        inputs = [sequences.BOS if token == sequences.EOS else token for token in tokens[:-1]]
        assert batch["tokens"][i].tolist() == inputs
        assert batch["targets"][i].tolist() == tokens[1:]
        assert batch["kinds"][i].tolist() == kinds[:-1]
        assert batch["target_kinds"][i].tolist() == kinds[1:]
        assert batch["mask"][i].tolist() == [j in answer for j in range(1, length)]


def test_rows_match_the_drawing_in_their_docstring():
    drawing = {}
    for line in sequences.Sequences.rows.__doc__.splitlines():
        name, *cells = line.split() or [""]
        if name in ("tokens", "kinds", "targets", "target_kinds", "mask") and len(cells) == 15:
            drawing[name] = cells
    builder = sequences.Sequences(sequences.train_tokenizer(["push it slowly"]), 3)
    codes = torch.tensor([[95, 12], [95, 12]])
    batch = builder.rows(["push it", "push it slowly"], [[3, 0, 7, 1]] * 2, LATENT, codes)
    words = {"<vis>": "<vision>", "</vis>": "</vision>", "<del>": "<delta>", "</del>": "</delta>"}

    def numbers(cells):
        names = [words.get(cell, cell) for cell in cells]
        return [int(n) if n.isdigit() else builder.tokenizer.token_to_id(n) for n in names]

    kinds = {"T": TEXT, "V": VISION, "L": LATENT}
    assert batch["tokens"][0].tolist() == numbers(drawing["tokens"])
    assert batch["targets"][0].tolist() == numbers(drawing["targets"])
    assert batch["kinds"][0].tolist() == [kinds[cell] for cell in drawing["kinds"]]
    assert batch["target_kinds"][0].tolist() == [kinds[cell] for cell in drawing["target_kinds"]]
    assert batch["mask"][0].tolist() == [cell == "1" for cell in drawing["mask"]]


def test_official_cut_gives_each_target_the_flag_of_the_next():
    texts, answers = ["push red", "block"], [[5, 1], [0, 7]]
    ours = sequences.Sequences(BUILDER.tokenizer, 2, length=9)
    official = sequences.Sequences(BUILDER.tokenizer, 2, length=9, official_cut=True)
    complete = BUILDER.rows(texts, answers, LATENT)
    assert complete["tokens"].shape[1] > 9
    plain, quirk = (builder.rows(texts, answers, LATENT) for builder in (ours, official))
    assert torch.equal(quirk["mask"][:, :-1], plain["mask"][:, 1:])
    assert not quirk["mask"][:, -1].any()
    assert all(torch.equal(quirk[name], plain[name]) for name in plain if name != "mask")
    long = sequences.Sequences(BUILDER.tokenizer, 2, length=30, official_cut=True)
    uncut = sequences.Sequences(BUILDER.tokenizer, 2, length=30)
    masks = [builder.rows(texts, answers, LATENT)["mask"] for builder in (long, uncut)]
    assert torch.equal(*masks)


def test_batch_holds_pictures_or_their_codes():
    rng = np.random.default_rng(0)
    episodes = [make_episode(text) for text in ("push red", "block")]
    for episode in episodes:
        episode.frames = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    answers, samples = [np.array([[5, 1], [0, 7]])] * 2, [(1, 0), (0, 1), (1, 1)]
    batch = BUILDER.batch(episodes, answers, LATENT, samples, torch.device("cpu"))
    expected = np.stack([episodes[e].frames[t] for e, t in samples]).transpose(0, 3, 1, 2)
    assert batch["images"].shape == (3, 3, 8, 8) and batch["images"].dtype == torch.float32
    np.testing.assert_allclose(batch["images"], expected / 127.5 - 1, atol=1e-6)
    rows = BUILDER.rows(["block", "push red", "block"], [[5, 1], [0, 7], [0, 7]], LATENT)
    assert all(torch.equal(batch[name], rows[name]) for name in rows)
    for i, episode in enumerate(episodes):
        episode.codes = np.array([[10 * i], [10 * i + 1]], np.uint16)
    batch = BUILDER.batch(episodes, answers, LATENT, samples, torch.device("cpu"))
    assert batch["images"] is None
    assert batch["tokens"][batch["kinds"] == VISION].tolist() == [
        *(10, END_OF_IMAGE),
        *(1, END_OF_IMAGE),
        *(11, END_OF_IMAGE),
    ]


def test_augment_encodes_shifted_pictures_and_puts_their_codes_into_the_rows():
    class Tokenizer:
        def encode(self, images):
            return (images.mean((1, 2, 3), keepdim=True)[..., 0, 0] * 100 + 200).long()

    texts, answers = ["push red", "block"], [[5, 1], [0, 7]]
    batch = BUILDER.rows(texts, answers, LATENT)
    batch["images"] = torch.rand(2, 3, 8, 8, generator=torch.manual_seed(0))
    assert sequences.augment(batch, 0.0, Tokenizer()) is batch
    torch.manual_seed(1)
    shifted = sequences.augment(batch, 0.25, None)["images"]
    assert not torch.equal(shifted, batch["images"])
    torch.manual_seed(1)
    augmented = sequences.augment(batch, 0.25, Tokenizer())
    expected = BUILDER.rows(texts, answers, LATENT, Tokenizer().encode(shifted))
    assert augmented["images"] is None
    assert torch.equal(augmented["tokens"], expected["tokens"])


# ---------------------------------------------------------------- prompts
def test_prompts_are_padded_on_the_left_and_begin_as_rows_do():
    tokens, kinds, valid = BUILDER.prompts(["push red", "block"], LATENT)
    prompt = "<s> <unk> {} <vision> 0 0 </vision> <delta>"
    assert tokens.tolist() == [
        ids_of(prompt.format("push red")),
        [sequences.PAD, *ids_of(prompt.format("block"))],
    ]
    assert valid.tolist() == [[True] * 9, [False] + [True] * 8]
    assert kinds[1].tolist() == [TEXT] * 5 + [VISION] * 2 + [TEXT] * 2
    trained = BUILDER.rows(["push red"], [[5, 1]], LATENT)["tokens"]
    assert trained[0, :9].tolist() == tokens[0].tolist()


def test_prompts_are_padded_to_a_multiple():
    tokens, kinds, valid = BUILDER.prompts(["push red", "block"], LATENT, multiple=16)
    assert tokens.shape == kinds.shape == valid.shape == (2, 16)
    assert valid.sum(1).tolist() == [9, 8] and (tokens[~valid] == sequences.PAD).all()


# ---------------------------------------------------------------- tokenizers
def test_dataset_tokenizer_reads_its_file_or_learns_the_words(make_dataset):
    def caption(root, rows):
        rows["a"]["captions"] = ["one mug"] * 5

    dataset = data.open_dataset(make_dataset({"a": 5}, caption), 8)
    learned = sequences.dataset_tokenizer(dataset)
    assert {"push", "it", "one", "mug"} <= learned.get_vocab().keys()
    special = [learned.token_to_id(token) for token in ("<pad>", "<s>", "</s>")]
    assert special == [sequences.PAD, sequences.BOS, sequences.EOS]
    BUILDER.tokenizer.save(str(dataset.path / "tokenizer.json"))
    assert sequences.dataset_tokenizer(dataset).get_vocab() == BUILDER.tokenizer.get_vocab()


def test_opening_tags_need_a_token_each(capsys):
    tags = sequences.opening_tags(BUILDER.tokenizer)
    assert tags == {LATENT: ids_of("<delta>")[0], ACTION: ids_of("<action>")[0]}
    spelled = sequences.Tokenizer(sequences.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(SystemExit):
        sequences.opening_tags(spelled)
    assert "no token for <delta> or <action>" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["words", "{instruction", "{task}", "{0}"])
def test_template_needs_a_place_for_the_instruction(template, capsys):
    with pytest.raises(SystemExit):
        sequences.Sequences(BUILDER.tokenizer, 2, template)
    assert "error: --template: expected words around {instruction}" in capsys.readouterr().err


# ---------------------------------------------------------------- cut answers, unknown words
@pytest.mark.parametrize("length, outcome", [(22, ""), (21, "cut"), (17, "cut"), (16, "refused")])
def test_length_must_leave_room_for_an_answer(length, outcome, capsys):
    tokenizer = sequences.train_tokenizer(["push the red block"])
    texts = ["push", "push the red block push the red block push"]
    episodes = [
        make_episode(text, name) for text, name in zip(texts, ("short", "long"), strict=True)
    ]
    codes = [np.zeros((2, 4), int)] * 2
    # bos, 9 words, <vision>, 4 patches, </vision>, <delta>: 17 tokens; 4 codes, </delta>, eos
    builder = sequences.Sequences(tokenizer, 4, length=length)
    rows = builder.rows(texts, [c[0] for c in codes], LATENT)
    answered = (rows["mask"] & (rows["target_kinds"] == LATENT)).sum(1).tolist()
    if outcome == "refused":
        assert answered == [4, 0]
        with pytest.raises(SystemExit):
            builder.check(episodes, codes, LATENT)
        message = capsys.readouterr().err
        assert "episodes 'long' (" in message and f"--length {length}: no room" in message
    else:
        assert answered[0] == 4 and answered[1] > 0
        builder.check(episodes, codes, LATENT)
        printed = capsys.readouterr().out
        assert ("cuts the end of 2 rows (first: episode 'long'" in printed) == (outcome == "cut")


def test_official_cut_leaves_room_for_one_token_less(capsys):
    tokenizer = sequences.train_tokenizer(["push the red block"])
    text = "push the red block push the red block push"
    codes = np.zeros((2, 4), int)
    builder = sequences.Sequences(tokenizer, 4, length=17, official_cut=True)
    rows = builder.rows([text], codes[:1], LATENT)
    assert not (rows["mask"] & (rows["target_kinds"] == LATENT)).any()
    with pytest.raises(SystemExit):
        builder.check([make_episode(text)], [codes], LATENT)
    assert "no room for an answer" in capsys.readouterr().err


def test_captions_count_their_end_of_text_as_an_answer(capsys):
    builder = sequences.Sequences(sequences.train_tokenizer(["push the red block"]), 4, length=9)
    builder.check([make_episode("push")], [["red", ""]], TEXT)
    with pytest.raises(SystemExit):
        builder.check([make_episode("push the red")], [["red", ""]], TEXT)


def test_unknown_words_are_named_once(capsys):
    builder = sequences.Sequences(sequences.train_tokenizer(["push the red block"]), 4)
    episodes = [make_episode(text) for text in ("push the mug", "grasp it", "push")]
    builder.check(episodes, [], LATENT)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "'mug', 'grasp', 'it'" in printed
    builder.check_words(["push the mug"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "texts, reason",
    [
        (["打开抽屉", "grasp mug"], "none of the words"),
        (["."], "none of the words"),
        ([""], "expected words"),
        (["  "], "expected words"),
        (["push \ud800"], "expected words"),
        (["push </s>"], "control token </s>"),
        (["<vision> </vision>"], "control token <vision>"),
    ],
)
def test_texts_without_a_known_word_are_refused(texts, reason):
    builder = sequences.Sequences(sequences.train_tokenizer(["push the red block"]), 4)
    with pytest.raises(sequences.NoKnownWord, match=re.escape(reason)):
        builder.check_words(texts)


def test_captions_of_unknown_words_are_named_or_refused(capsys):
    builder = sequences.Sequences(sequences.train_tokenizer(["push the red block"]), 4)
    builder.check([make_episode("push")], [["<delta> red </delta>", "blue"]], TEXT)
    assert "'blue'" in capsys.readouterr().out
    for captions in (["blue", "green"], ["", ""]):
        with pytest.raises(sequences.NoKnownWord):
            builder.check([make_episode("push")], [captions], TEXT)
