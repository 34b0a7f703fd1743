"""Stage 3: what a policy inherits, low-rank changes, labelled episodes, action bins."""

import json
import shutil

import numpy as np
import pytest
import torch
from runs import (
    COMMANDS,
    FINETUNE,
    read_config,
    read_jsonl,
    read_training_state,
    read_weights,
)
from small import SEQUENCES, TEXTS

import common
import data
import finetune
import model
import training
from model import ACTION, VLA


# ---------------------------------------------------------------- what is inherited
def test_finetuning_inherits_the_body_and_keeps_vision_frozen(runs):
    base, latent, policy, action, kept = (
        read_weights(runs / name) for name in ("base", "latent", "LAPA", "action", "ACTIONVLA")
    )
    for name in ("patch_embed.weight", "patch_position"):
        assert torch.equal(base[name], latent[name]) and torch.equal(base[name], policy[name])

    def action_heads(tensors):
        return {name for name in tensors if name.endswith("n_head.weight")}

    assert "latent_head.weight" in latent and "latent_head.weight" not in policy
    assert action_heads(policy) == {"action_head.weight"} and not action_heads(latent)
    for a, b, name in ((latent, policy, "norm.weight"), (action, kept, "action_head.weight")):
        assert 0 < (a[name] - b[name]).abs().max() < 5e-3  # two small steps, not a new tensor
    bins = [read_config(runs / name)["bins"] for name in ("action", "ACTIONVLA", "LAPA")]
    assert bins[0] == bins[1] != bins[2]  # ACTIONVLA keeps its bins with its head


# ---------------------------------------------------------------- low-rank changes
@pytest.mark.parametrize(
    "init, more", [("latent", ""), ("action", ""), ("latent", "--bf16 true --checkpointing true")]
)
def test_low_rank_finetuning_exports_merged_weights(runs, call, tmp_path, init, more):
    out = tmp_path / "out"
    line = f"{FINETUNE} --init_from DIR/{init} --out OUT {more}"
    assert call(f"{line} --lora_rank 2") == 0
    before, after, full = map(read_weights, (runs / init, out, runs / "LAPA"))
    assert {n: w.shape for n, w in after.items()} == {n: w.shape for n, w in full.items()}
    for name in after.keys() & before.keys():
        change = after[name] - before[name]
        if name.startswith("layers.") and change.dim() == 2:
            assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-3) <= 2, name
        else:
            assert name in ("text_embed.weight", "action_head.weight") or not change.any(), name
    assert init == "latent" or (after["action_head.weight"] != before["action_head.weight"]).any()
    learned = read_training_state(common.latest(out))["optimizer"]["state"]
    assert all(name.endswith((".up", ".down", "action_head.weight")) for name in learned)
    assert len(learned) == 4 * 7 * 2 + 1
    assert call(f"{line} --resume true --steps 4") == 2  # continued as another
    line = "evaluate.py --policies A=OUT --out OUT/evaluate --episodes 2 --max_steps 2 --bf16 true"
    assert call(line) == 0


def test_low_rank_changes_start_at_zero_also_from_the_meta_device(vla):
    with torch.device("meta"):
        net = VLA(vla.config)
    finetune.add_low_rank(net, 2, torch.bfloat16)
    c = finetune.FinetuneConfig(data="", out="", init_from="")
    training.place(net, c, training.start_processes(), net.layers)
    assert all(name.endswith(model.LOW_RANK) for name in net.load_pretrained(vla.state_dict()))
    assert net.layers[0].wq.weight.dtype == torch.bfloat16
    rows = SEQUENCES.rows(TEXTS, [[1, 2]] * 3, ACTION)
    images = torch.rand(3, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, known = (m(rows["tokens"], rows["kinds"], images) for m in (net, vla))
    torch.testing.assert_close(hidden, known)


# ---------------------------------------------------------------- labelled episodes and bins
def test_a_preset_uses_what_labelled_episodes_there_are(runs, call, capsys, tmp_path):
    mixed = shutil.copytree(runs / "table", tmp_path / "mixed")
    rows = read_jsonl(mixed / "episodes.jsonl")
    for row in rows[::2]:
        del row["actions"]
    (mixed / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    left = [e for e in data.open_dataset(mixed, 64).split(2)[0] if e.actions is not None]
    line = COMMANDS["SCRATCH"].replace("--labelled 6 ", "")
    more = ("--data", mixed, "--out", tmp_path / "run")
    assert call(line, *more) == 0 and 4 <= len(left) <= 6  # the preset asks for 100
    assert f"\n{len(left)} labelled episodes" in capsys.readouterr().out
    assert call(line, *more, "--labelled", 7) == 2
    assert f"only {len(left)} episodes with actions" in capsys.readouterr().err


def test_bins_come_from_the_labelled_actions_or_from_a_body_pretrained_on_actions(capsys):
    c = finetune.FinetuneConfig(data="D", out="", init_from="I", bins=4)
    actions = np.stack([np.arange(40), np.arange(40) % 2], 1).astype(np.float32)
    fitted = finetune.choose_bins(c, {"labels": "latent"}, actions)
    expected = data.fit_bins(actions, 4)
    assert all(np.array_equal(a, b) for a, b in zip(fitted, expected, strict=True))
    meta = {"labels": "action", "bins": [list(edges) for edges in data.fit_bins(actions[:30], 16)]}
    kept = finetune.choose_bins(c, meta, actions)
    assert [list(edges) for edges in kept] == meta["bins"] and len(kept[0]) != len(fitted[0])
    for wrong, said in (
        (actions[:, :1], "D: actions have width 1, --init_from I was trained on width 2"),
        (actions * 9, "--init_from I: its bins were made for other values"),
    ):
        with pytest.raises(SystemExit):
            finetune.choose_bins(c, meta, wrong)
        assert said in capsys.readouterr().err
