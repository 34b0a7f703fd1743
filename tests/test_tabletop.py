"""The built-in table top: reproducible, solvable by its expert, honest about what it shows."""

import numpy as np
import pytest

from simulators import tabletop
from simulators.tabletop import FAMILIES, TableTop


@pytest.mark.parametrize("look", ["plain", "real"])
@pytest.mark.parametrize("embodiment", ["robot", "human"])
def test_the_same_seed_gives_the_same_episodes_bit_for_bit(embodiment, look):
    env = TableTop(6, embodiment, look, size=48)

    def play(env, seed):
        seen = [env.reset(seed)[0]]
        while not env.done.all():
            seen.append(env.step(env.expert(0.3))[0])
        return seen

    first, again = play(env, 7), play(env, 7)
    other = play(TableTop(6, embodiment, look, size=48), 7)
    assert len(first) == len(other) == len(again) > 5
    for a, b, c in zip(first, other, again, strict=True):
        assert a["instruction"] == b["instruction"] == c["instruction"]
        assert np.array_equal(a["image"], b["image"]) and np.array_equal(a["image"], c["image"])
    assert a["image"].shape == (6, 48, 48, 3) and a["image"].dtype == np.uint8
    assert not np.array_equal(first[0]["image"], play(env, 8)[0]["image"])


@pytest.mark.parametrize("embodiment", ["robot", "human"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_succeeds_and_noise_does_not(family, embodiment):
    rate = []
    for act in (lambda env: env.expert(), lambda env: env.rng.uniform(-1, 1, (400, 2))):
        env = TableTop(400, embodiment, families=(family,), size=8)
        env.reset(11)
        while not env.done.all():
            env.step(act(env))
        rate.append(env.success.mean())
    assert set(env.task[:, 0]) == {FAMILIES.index(family)}
    assert rate[0] >= 0.98 and rate[1] < 0.5


def test_looks_differ():
    plain, human, real = (
        TableTop(4, *k).reset(5)[0]["image"].astype(int)
        for k in (("robot",), ("human",), ("robot", "real"))
    )
    assert np.abs(plain - human).mean() > 10 and np.abs(plain - real).mean() > 10
    assert [len(np.unique(images[:, 1, 1], axis=0)) for images in (plain, real)] == [1, 4]


@pytest.mark.parametrize(
    "action",
    [np.zeros((3, 2)), np.zeros(2), np.zeros((2, 3)), np.array([[0, np.nan], [0, 0]])],
    ids=str,
)
def test_wrong_actions_are_refused(action):
    env = TableTop(2, size=8)
    env.reset(0)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        env.step(action)


def test_episodes_are_truncated_and_finished_tables_do_not_move():
    env, rewards, kept = TableTop(64, size=8, max_steps=20), np.zeros(64), {}
    env.reset(1)
    for _ in range(25):
        before = env.done.copy()
        _, reward, terminated, truncated, info = env.step(env.expert())
        rewards += reward
        assert not reward[before].any() and not (terminated & truncated).any()
        assert np.array_equal(env.done, terminated | truncated)
        assert np.array_equal(info["success"], terminated)
        for b in np.flatnonzero(env.done):
            now = [x[b].tobytes() for x in (env.tip, env.blocks, env.image, env.steps, env.success)]
            assert kept.setdefault(b, now) == now
    assert 0 < env.success.sum() < 64 and env.done.all()  # some were cut off
    assert np.array_equal(rewards, env.success)  # each is rewarded once
    assert (env.steps[~env.success] == 20).all() and (env.steps <= 20).all()


def test_seen_and_unseen_tasks_are_disjoint_and_complete():
    every, seen, unseen = (tabletop.tasks(s) for s in ("all", "seen", "unseen"))
    assert sorted(seen + unseen) == sorted(every) and not set(seen) & set(unseen)
    assert len({tabletop.instruction(*t) for t in every}) == len(every) == 4 + 16 + 32 + 12
    for split, rows in (("seen", seen), ("unseen", unseen)):
        assert {f for f, _, _ in rows} == set(range(len(FAMILIES)))
        assert {b for _, b, _ in rows} == set(range(4))  # no block is new, only its combination
        env = TableTop(300, split=split, size=8)
        env.reset(0)
        assert set(map(tuple, env.task)) <= set(rows)
