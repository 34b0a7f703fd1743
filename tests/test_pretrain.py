"""Stage 2: its loss, the labels it reads, options that do not fit together."""

import numpy as np
import pytest
import torch
from runs import PRETRAIN, read_config
from small import SEQUENCES, TEXTS
from torch.nn import functional as F

import data
import pretrain
from model import ACTION, LATENT, TEXT


# ---------------------------------------------------------------- loss
def rows_of(kind, answers):
    """A batch of small.TEXTS with pictures"""
    torch.manual_seed(0)
    return SEQUENCES.rows(TEXTS, answers, kind) | {"images": torch.rand(3, 3, 16, 16)}


CODES = np.array([[5, 1, 0], [7, 0, 2], [3, 3, 6]])


@pytest.mark.parametrize("kind", [LATENT, ACTION])
def test_labels_and_tags_are_weighted_99_to_1(vla, kind):
    rows = rows_of(kind, CODES)
    hidden = vla(rows["tokens"], rows["kinds"], rows["images"])
    labels, accuracy = vla.answer_loss(hidden, rows, kind)
    tags, _ = vla.answer_loss(hidden, rows, TEXT)
    loss, found = pretrain.loss_of(vla, rows, kind)
    torch.testing.assert_close(loss, 0.99 * labels + 0.01 * tags)
    assert found == accuracy and labels > 0 and tags > 0


def test_neighboring_bins_are_alike_but_neighboring_codes_are_not(vla):
    for kind, softened in ((ACTION, True), (LATENT, False)):
        rows = rows_of(kind, CODES)
        plain, soft = (pretrain.loss_of(vla, rows, kind, soft)[0] for soft in (0.0, 2.0))
        assert (plain != soft) == softened


def test_captions_have_the_plain_cross_entropy_of_their_words(vla):
    rows = rows_of(TEXT, ["red", "block", "left"])
    loss, accuracy = pretrain.loss_of(vla, rows, TEXT)
    hidden = vla(rows["tokens"], rows["kinds"], rows["images"])
    logits, targets = vla.text_head(hidden[rows["mask"]]), rows["targets"][rows["mask"]]
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))  # rows are equally long
    assert float(accuracy) == pytest.approx(float((logits.argmax(-1) == targets).float().mean()))


def test_the_official_text_mask_trains_latent_positions_toward_token_0(vla):
    rows = rows_of(LATENT, CODES)
    misread = pretrain.misread_text_mask(rows)
    latent = rows["target_kinds"] == LATENT
    assert latent.sum() == CODES.size
    assert (misread["targets"][latent] == 0).all()
    assert (misread["target_kinds"][latent] == TEXT).all()
    for name in ("targets", "target_kinds"):
        assert torch.equal(misread[name][~latent], rows[name][~latent])
    ours, official = (
        pretrain.loss_of(vla, rows, LATENT, official_text_mask=mask)[0] for mask in (False, True)
    )
    assert ours != official


# ---------------------------------------------------------------- labels and options
def test_bins_are_fitted_to_the_training_episodes_alone(make_dataset):
    dataset = data.open_dataset(make_dataset({"a": 9, "b": 9, "c": 9}), 8)
    train_set, held_out = dataset.episodes[:2], dataset.episodes[2:]
    c = pretrain.PretrainConfig(data="", out="", labels="action", bins=4)
    answers = pretrain.read_answers(c, dataset, train_set, held_out)
    edges = data.fit_bins(np.concatenate([e.actions for e in train_set]), 4)
    assert answers.notes == {"bins": [list(e) for e in edges]} and answers.marks == {}
    for found, episodes in ((answers.train, train_set), (answers.held_out, held_out)):
        for rows, episode in zip(found, episodes, strict=True):
            assert np.array_equal(rows, data.to_bins(episode.actions, edges))


def test_captions_come_from_the_dataset(make_dataset, capsys):
    def caption(root, rows):
        rows["a"]["captions"] = ["one mug"] * 5

    dataset = data.open_dataset(make_dataset({"a": 5, "b": 4}, caption), 8)
    a, b = dataset.episodes
    c = pretrain.PretrainConfig(data="D", out="", labels="caption")
    answers = pretrain.read_answers(c, dataset, [a], [])
    assert answers.train == [["one mug"] * 5] and answers.held_out == []
    with pytest.raises(SystemExit):
        pretrain.read_answers(c, dataset, [a], [b])
    assert "D/episodes.jsonl: episode 'b': field captions: missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, given, said",
    [
        ({"labels": "guess"}, set(), "--labels 'guess': expected one of latent, action, idm, cap"),
        ({"labels": "latent"}, set(), "--labels latent needs --laq"),
        ({"labels": "idm"}, set(), "--labels idm needs --labels_file"),
        ({"labels": "action"}, {"action_vocab"}, "--action_vocab: follows from"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(capsys, options, given, said):
    with pytest.raises(SystemExit) as stop:
        pretrain.settle_options(pretrain.PretrainConfig(data="", out="", **options), given)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_shape_comes_from_the_checkpoint_it_starts_from(runs):
    shape = read_config(runs / "base")["model"]
    c = pretrain.PretrainConfig(data="", out="", labels="action", init_from=str(runs / "base"))
    assert c.image_size != shape["image_size"]
    pretrain.settle_options(c, set())
    for name in ("image_size", "patch_size", "vision_vocab"):
        assert getattr(c, name) == shape[name]


def test_a_checkpoint_within_a_run_finds_the_labels_of_the_run(runs, call):
    checkpoint = next((runs / "laq").glob("step_*"))
    line = f"{PRETRAIN} --labels latent --out OUT --laq"
    assert call(line, checkpoint) == 0


# ---------------------------------------------------------------- what learns
def test_vision_stays_frozen_only_where_it_was_pretrained(vla):
    def learning(**options):
        c = pretrain.PretrainConfig(data="", out="", lr=1.0, head_lr=3.0, **options)
        vla.requires_grad_(True)
        optimizer = pretrain.make_optimizer(vla, c, ["latent_head.weight"])
        names = {id(p): name for name, p in vla.named_parameters()}
        return {
            names[id(p)]: group["peak"] for group in optimizer.param_groups for p in group["params"]
        }

    scratch, frozen = learning(), learning(init_from="x")
    assert (
        scratch.keys() - frozen.keys()
        == {name for name in scratch if name.startswith("patch_")}
        != set()
    )
    assert learning(init_from="x", freeze_vision=False).keys() == scratch.keys()
    assert scratch["latent_head.weight"] == 3.0 and scratch["latent_embed.weight"] == 1.0
