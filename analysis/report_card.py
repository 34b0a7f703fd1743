"""Report card of a latent action quantizer: what its codes are worth on held-out episodes.

Three questions, each with the number that answers "no":
    Are the codes used?           perplexity 1: always the same code
    Does the decoder need them?   PSNR lost by shuffling them among the pairs: 0 dB
    Do they name motion?          probe R2 of the true displacement: 0, as with shuffled codes
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

import common
import data
from analysis import atlas
from model import LAQ

# (model, episodes, window in seconds) -> {episode id: codes int64 [T, K]}, one row per frame
Labeler = Callable[[LAQ, list[data.Episode], float], dict[str, np.ndarray]]
Card = dict[str, int | float | list[int] | list[float | None]]


# ------------------------------------------------------------------------ metrics
def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [0, 1] from their mean squared error:
    -10 log10(mse).  0 for an error of 1, higher is better; at most 120 (mse below 1e-12)."""
    return float(-10 * np.log10(max(mse, 1e-12)))


def perplexity(codes: np.ndarray, codebook_size: int) -> float:
    """exp(-sum_v p_v ln p_v) of one slot's codes, int [M], where p_v is the frequency of code v.
    From 1 (always the same code) to codebook_size (all codes equally often)."""
    frequency = np.bincount(codes, minlength=codebook_size) / len(codes)
    used = frequency[frequency > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def one_hot(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """Codes int [M, K] -> float [M, K * codebook_size + 1]: each slot one-hot, then a constant 1"""
    slots = np.eye(codebook_size)[codes].reshape(len(codes), -1)  # M, K * V
    return np.pad(slots, ((0, 0), (0, 1)), constant_values=1)


def probe_r2(
    codes: np.ndarray,
    target: np.ndarray,
    test_codes: np.ndarray,
    test_target: np.ndarray,
    codebook_size: int,
    ridge: float = 1e-2,
) -> list[float | None]:
    """Linear probe: how much of the true motion can be read off the codes.

    Ridge regression W = (X^T X + ridge I)^-1 X^T Y from one-hot codes, int [M, K], to targets,
    float [M, A], is fitted on the first two arguments and tested on the next two.  -> R2 = 1 -
    |Y - X W|^2 / |Y - mean Y|^2 on the test pairs, one number per axis: 1 is perfect, 0 no better
    than the mean, below 0 worse than it; None for an axis that never moves there."""
    X = one_hot(codes, codebook_size)
    weights = np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ target)
    return data.r2(one_hot(test_codes, codebook_size) @ weights, test_target)


def window_motion(episode: data.Episode, window: float) -> np.ndarray:
    """True displacement over each frame's window of `window` seconds, float [T, A]: the sum of the
    actions a_t .. a_{t+H-1}, fewer at the end of the episode and 0 at its last frame."""
    now = np.arange(len(episode.frames))
    later = data.future_index(now, len(now), data.window_frames(window, episode.fps))
    total = np.pad(episode.actions.cumsum(0).astype(float), ((1, 0), (0, 0)))
    return total[later] - total[now]


# ------------------------------------------------------------------------ the card
def sample_pairs(episodes: list[data.Episode], window: float, seed: int) -> Tensor:
    """Up to 2048 frame pairs in random order, float [M, 2, 3, S, S] in [0, 1].  The last frame of
    an episode has no later one and begins no pair."""
    rows = [(e, t) for e, episode in enumerate(episodes) for t in range(len(episode.frames) - 1)]
    chosen = np.random.default_rng(seed).permutation(rows)[:2048]
    return data.to_float(data.frame_pairs(episodes, chosen, window))


def label_and_draw(
    model: LAQ, pairs: Tensor, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, float]]:
    """Label the pairs, float [M, 2, 3, S, S], and draw their later frames.  -> codes int64 [M, K],
    and PSNR in dB of three guesses: drawn from its codes ("drawn"), the first frame itself
    ("copied"), drawn from the codes of another pair ("shuffled")."""
    codes = []
    squared_error = {"drawn": 0.0, "copied": 0.0, "shuffled": 0.0}  # summed over pairs
    for part in pairs.to(next(model.parameters()).device).split(256):
        first, later = part.unbind(1)  # [B, 3, S, S] each
        part_codes = model.label(part)  # B, K
        other_codes = part_codes[rng.permutation(len(part_codes))]
        guesses = {
            "drawn": model.imagine(first, part_codes),
            "copied": first,
            "shuffled": model.imagine(first, other_codes),
        }
        for name, picture in guesses.items():
            error = (picture.clamp(0, 1) - later) ** 2
            squared_error[name] += float(error.mean((1, 2, 3)).sum())
        codes.append(part_codes.cpu().numpy())
    quality = {name: psnr(total / len(pairs)) for name, total in squared_error.items()}
    return np.concatenate(codes), quality


def probe_motion(
    model: LAQ,
    label_episodes: Labeler,
    train_set: list[data.Episode],
    held_out: list[data.Episode],
    window: float,
    rng: np.random.Generator,
) -> dict[str, list[float | None]]:
    """Probe R2 of the true motion, fitted on the first 500 training episodes, tested on the
    held-out ones; and the same with codes shuffled among frames, which shows what chance gives.
    Only episodes with actions count; {} where one of the two sides has none."""
    fit_set, test_set = (
        [e for e in part if e.actions is not None] for part in (train_set[:500], held_out)
    )
    if not fit_set or not test_set:
        return {}
    fit_codes = np.concatenate([*label_episodes(model, fit_set, window).values()])
    test_codes = np.concatenate([*label_episodes(model, test_set, window).values()])
    fit_motion = np.concatenate([window_motion(episode, window) for episode in fit_set])
    test_motion = np.concatenate([window_motion(episode, window) for episode in test_set])
    size = model.config.codebook_size
    r2 = probe_r2(fit_codes, fit_motion, test_codes, test_motion, size)
    fit_codes = rng.permutation(fit_codes)
    test_codes = rng.permutation(test_codes)
    r2_shuffled = probe_r2(fit_codes, fit_motion, test_codes, test_motion, size)
    return {"probe_r2": r2, "probe_r2_shuffled": r2_shuffled}


def markdown(card: Card) -> str:
    """The card as a Markdown table of two columns, without a last newline"""
    lines = ["| report card | held-out pairs |", "|---|---|"]
    for name, value in card.items():
        shown = str(value).strip("[]").replace("None", "never moves")
        lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    return "\n".join(lines)


def report(
    model: LAQ,
    label_episodes: Labeler,
    train_set: list[data.Episode],
    held_out: list[data.Episode],
    window: float,
    out: str | Path,
    seed: int = 0,
) -> tuple[Card, list[Path]]:
    """Measure a quantizer on held-out episodes, print the card and write it to `out` with pictures.

    label_episodes: see Labeler; window: seconds from x_t to x_{t+H}.  -> the card, and the files
    written: report.json, report.md, reconstructions.png, atlas.png.  Exits with code 2 and one
    line where `out` cannot be written."""
    out, rng = Path(out), np.random.default_rng(seed)
    with common.refuse(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    pairs = sample_pairs(held_out, window, seed)
    codes, quality = label_and_draw(model, pairs, rng)
    card = {
        "pairs": len(pairs),
        "episodes": len(held_out),
        "codes_used": [len(np.unique(slot)) for slot in codes.T],
        "perplexity": [round(perplexity(s, model.config.codebook_size), 2) for s in codes.T],
        "combinations_used": len(np.unique(codes, axis=0)),
        "psnr": round(quality["drawn"], 2),
        "psnr_copy_first_frame": round(quality["copied"], 2),
        "psnr_shuffled_codes": round(quality["shuffled"], 2),
        "psnr_above_copy": round(quality["drawn"] - quality["copied"], 2),
        "psnr_lost_by_shuffling": round(quality["drawn"] - quality["shuffled"], 2),
    }
    for name, scores in probe_motion(
        model, label_episodes, train_set, held_out, window, rng
    ).items():
        card[name] = [score if score is None else round(score, 3) for score in scores]
    text = markdown(card)
    print(text)
    files = [out / n for n in ("report.json", "report.md", "reconstructions.png", "atlas.png")]
    common.write_atomically(files[0], common.to_json(card, 1) + "\n")
    common.write_atomically(files[1], text + "\n")
    draw_pictures(model, pairs, codes, *files[2:])
    return card, files


def draw_pictures(
    model: LAQ, pairs: Tensor, codes: np.ndarray, reconstructions: Path, atlas_path: Path
) -> None:
    """Eight pairs, float [M, 2, 3, S, S], beside what the decoder draws from their codes; and the
    atlas of the most frequent codes, int [M, K], on the first frames of six pairs"""
    device = next(model.parameters()).device
    shown = pairs[:8].to(device)
    drawn = model.imagine(shown[:, 0], model.label(shown))
    columns = {"x_t": shown[:, 0], "x_t+H": shown[:, 1], "drawn": drawn}
    atlas.contact_sheet(columns, reconstructions)
    atlas.draw_atlas(model, pairs[:6, 0].to(device), codes, atlas_path)
