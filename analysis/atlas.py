"""Atlas of latent actions: what each code does to each frame, drawn by the quantizer's decoder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import common
from model import LAQ


def contact_sheet(
    columns: dict[str, Tensor], path: Path, size: int = 96, gap: int = 4, head: int = 16
) -> None:
    """Write pictures as a table to a PNG: one titled column per entry.

    columns: title -> pictures, float [N, 3, H, W], clamped to [0, 1], N the same for all.  size,
    gap, head: pixels of a picture's side, between pictures, and of the titles' line."""
    rows, step = len(next(iter(columns.values()))), size + gap
    sheet = Image.new("RGB", (gap + len(columns) * step, head + rows * step), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns.items()):
        x = gap + column * step
        pen.text((x, 2), title, fill="black")
        # N, H, W, 3
        pixels = (pictures.clamp(0, 1).movedim(1, -1) * 255).round().byte().cpu().numpy()
        for row, picture in enumerate(pixels):
            tile = Image.fromarray(picture).resize((size, size), Image.BICUBIC)
            sheet.paste(tile, (x, head + row * step))
    with common.refuse(f"{path}: not written"), common.atomically(path) as draft:
        sheet.save(draft)


def draw_atlas(
    model: LAQ, starts: Tensor, codes: np.ndarray, path: Path, most_frequent: int = 8
) -> None:
    """Apply the most frequent latent actions to the same start frames (paper section 5): a column
    that names a motion moves things the same way in every row.

    starts: float [N, 3, S, S] in [0, 1], one row each; codes: int [M, K], among which the frequent
    combinations are counted, one column each, the most frequent first."""
    combinations, counts = np.unique(codes, axis=0, return_counts=True)
    columns = {"x_t": starts}
    for latent_action in combinations[np.argsort(-counts)[:most_frequent]]:  # K
        same_for_all = torch.from_numpy(latent_action).to(starts.device).expand(len(starts), -1)
        title = " ".join(map(str, latent_action))
        columns[title] = model.imagine(starts, same_for_all)
    contact_sheet(columns, path)
