"""Report card of a latent action quantizer on held-out episodes, and its atlas."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import common
import data


def psnr(mse):
    """Mean squared error of pixels in [0, 1] -> dB"""
    return float(-10 * np.log10(max(mse, 1e-12)))


def perplexity(codes, size):
    """exp of the entropy of one slot's codes, int [M]; 1 when collapsed, `size` when even"""
    share = np.bincount(codes, minlength=size) / len(codes)
    return float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))


def probe_r2(codes, target, test_codes, test_target, size, ridge=1e-2):
    """Linear probe: one-hot codes int [M, K] -> target float [M, A], fitted on the first two
    arguments by ridge regression.  -> R2 on the test pairs, one number per axis; None for an axis
    that never moves there."""
    features = lambda rows: np.pad(
        np.eye(size)[rows].reshape(len(rows), -1), ((0, 0), (0, 1)), constant_values=1
    )  # M, K*V + 1
    X = features(codes)
    solved = np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ target)
    return data.r2(features(test_codes) @ solved, test_target)


def window_motion(episode, window):
    """Sum of an episode's actions over each frame's window, [T, A]: its true displacement"""
    now = np.arange(len(episode.frames))
    later = data.future_index(now, len(now), data.window_frames(window, episode.fps))
    total = np.pad(episode.actions.cumsum(0).astype(float), ((1, 0), (0, 0)))
    return total[later] - total[now]


def report(model, label, train_set, held_out, window, out, seed=0):
    """Report card on held-out episodes -> numbers, files written."""
    out, rng = Path(out), np.random.default_rng(seed)
    with common.refuse(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    device, c = next(model.parameters()).device, model.config
    rows = [(e, t) for e, episode in enumerate(held_out) for t in range(len(episode.frames) - 1)]
    which = np.random.default_rng(seed).permutation(rows)[:2048]
    pairs = data.to_float(data.frame_pairs(held_out, which, window))
    codes, error = [], np.zeros(3)  # squared, of pictures drawn, copied, drawn from shuffled codes
    for part in pairs.to(device).split(256):
        first, z = part[:, 0], model.label(part)
        other = z[rng.permutation(len(z))]
        error += [
            float(((picture.clamp(0, 1) - part[:, 1]) ** 2).mean((1, 2, 3)).sum())
            for picture in (model.imagine(first, z), first, model.imagine(first, other))
        ]
        codes.append(z.cpu().numpy())
    codes = np.concatenate(codes)
    drawn, copied, shuffled = (psnr(total / len(pairs)) for total in error)
    card = {
        "pairs": len(pairs),
        "episodes": len(held_out),
        "codes_used": [len(np.unique(slot)) for slot in codes.T],
        "perplexity": [round(perplexity(slot, c.codebook_size), 2) for slot in codes.T],
        "combinations_used": len(np.unique(codes, axis=0)),
        "psnr": round(drawn, 2),
        "psnr_copy_first_frame": round(copied, 2),
        "psnr_shuffled_codes": round(shuffled, 2),
        "psnr_above_copy": round(drawn - copied, 2),
        "psnr_lost_by_shuffling": round(drawn - shuffled, 2),
    }
    known = [[e for e in part if e.actions is not None] for part in (train_set[:500], held_out)]
    if all(known):
        x = [np.concatenate([*label(model, part, window).values()]) for part in known]
        y = [np.concatenate([window_motion(e, window) for e in part]) for part in known]
        mixed = [rng.permutation(rows) for rows in x]
        for name, (fit, test) in (("probe_r2", x), ("probe_r2_shuffled", mixed)):
            card[name] = [
                r if r is None else round(r, 3)
                for r in probe_r2(fit, y[0], test, y[1], c.codebook_size)
            ]
    lines = ["| report card | held-out pairs |", "|---|---|"]
    lines += [
        f"| {k.replace('_', ' ')} | {str(v).strip('[]').replace('None', 'never moves')} |"
        for k, v in card.items()
    ]
    print("\n".join(lines))
    common.write_atomically(out / "report.md", "\n".join(lines) + "\n")
    common.write_atomically(out / "report.json", common.to_json(card, 1) + "\n")
    few = pairs[:8].to(device)
    imagined = model.imagine(few[:, 0], model.label(few))
    contact_sheet(
        {"x_t": few[:, 0], "x_t+H": few[:, 1], "drawn": imagined}, out / "reconstructions.png"
    )
    draw_atlas(model, pairs[:6, 0].to(device), codes, out / "atlas.png")
    return card, [out / n for n in ("report.json", "report.md", "reconstructions.png", "atlas.png")]


def contact_sheet(columns, path, size=96, gap=4, head=16):
    """columns: title -> pictures, float [N, 3, H, W] in [0, 1] -> a PNG"""
    rows, step = len(next(iter(columns.values()))), size + gap
    sheet = Image.new("RGB", (gap + len(columns) * step, head + rows * step), "white")
    for i, (title, pictures) in enumerate(columns.items()):
        ImageDraw.Draw(sheet).text((gap + i * step, 2), title, fill="black")
        pixels = (pictures.clamp(0, 1).movedim(1, -1) * 255).round().byte().cpu().numpy()
        for r, cell in enumerate(pixels):
            tile = Image.fromarray(cell).resize((size, size), Image.BICUBIC)
            sheet.paste(tile, (gap + i * step, head + r * step))
    with common.refuse(f"{path}: not written"), common.atomically(path) as draft:
        sheet.save(draft)


def draw_atlas(model, starts, codes, path, most=8):
    """What the decoder says each of the most frequent code combinations does to each start frame
    (paper section 5): the same column should move things the same way in every row."""
    combinations, counts = np.unique(codes, axis=0, return_counts=True)
    columns = {"x_t": starts}
    for z in combinations[np.argsort(-counts)[:most]]:
        same = torch.from_numpy(z).to(starts.device).expand(len(starts), -1)
        columns[" ".join(map(str, z))] = model.imagine(starts, same)
    contact_sheet(columns, path)
