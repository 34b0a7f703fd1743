"""Stage 3: low-rank changes"""

import torch
from small import SEQUENCES, TEXTS

import finetune
import model
import training
from model import ACTION, VLA


def test_low_rank_changes_begin_at_nothing_from_the_meta_device_on(vla):
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
