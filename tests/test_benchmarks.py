"""What finetuning a 7B needs, as the benchmarks compute it"""

from dataclasses import fields

import pytest
import torch

import finetune
import quantize
from benchmarks.memory import finetuning_memory
from benchmarks.networks import SHAPES, random_rows, training_step
from model import LAQ, VLA, LAQConfig, VLAConfig


def test_memory_of_the_7b_by_hand():
    """6.8e9 parameters: 4 bytes each in weights and gradients, 8 in Adam's moments; LoRA keeps the
    6.5e9 of the blocks in 2 bytes"""
    config = VLAConfig(latent_vocab=0, action_vocab=256)
    full, shared, low = (
        finetuning_memory(config, 1, 384, gpus, True, rank)
        for gpus, rank in ((1, 0), (8, 0), (1, 16))
    )
    assert full["weights"] == full["gradients"] == full["optimizer"] / 2 == 4 * 6_809_718_784
    assert shared["weights"] == full["weights"] / 8
    assert low["weights"] == pytest.approx(2 * 6.476e9 + 4 * 0.374e9, rel=1e-3)
    assert low["gradients"] < 0.02 * full["gradients"]
    kept = [
        finetuning_memory(config, rows, 384, 8, remade)["activations and copies"]
        for rows, remade in ((1, False), (2, False), (2, True))
    ]
    assert kept[1] - kept[0] == pytest.approx(384 * 32 * 4096 * 57, rel=0.1)  # measured: 57.4
    assert kept[2] < kept[1]


def test_a_benchmark_trains_as_the_stages_do():
    """One step of each network: the loops of the benchmarks keep up with those of the stages"""
    torch.manual_seed(0)
    c = quantize.QuantizeConfig(data="", out="", **quantize.PRESETS["tiny"] | {"shift_from": 0})
    c.batch = 4
    shape = {field.name: getattr(c, field.name) for field in fields(LAQConfig)}
    laq = LAQ(LAQConfig(**shape))
    before = laq.to_pixels.weight.clone()
    training_step(laq, c, torch.rand(4, 2, 3, 32, 32))()
    assert not torch.equal(laq.to_pixels.weight, before)

    c = finetune.FinetuneConfig(data="", out="", init_from="", batch=2)
    vla = VLA(VLAConfig(**SHAPES["tiny"]))
    before = vla.action_head.weight.clone()
    training_step(vla, c, random_rows(vla.config, 2, 42))()
    assert not torch.equal(vla.action_head.weight, before)
