"""The image codes of a dataset's frames, made once by a VQGAN and kept in a packed cache"""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

import video
from common import fail
from data import Dataset, Episode, ImageTokenizer, to_float
from training import Processes


def add_codes(
    dataset: Dataset,
    episodes: Sequence[Episode],
    vqgan: ImageTokenizer,
    processes: Processes,
    frames_in_memory: int = 1 << 16,
) -> None:
    """Give episodes of a dataset the codes of their frames, uint16 [T, N] memory-mapped.

    Codes are made once, a share by each process, and kept in a packed cache under the VQGAN's hash.
    frames_in_memory: when more frames than that are encoded, their codes are written"""
    size = vqgan.config.image_size
    side = size // 2 ** (len(vqgan.config.multipliers) - 1)  # codes in a row of the image
    try:
        path = video.cache_file(f"codes_{vqgan.mark}_{size}", dataset.path)
        pack = video.Pack(path, (side * side,), "uint16")
        missing = {e.key: e for e in episodes if e.key not in pack.entries}
        local = list(missing.values())[processes.rank :: processes.world]
        waiting: dict[str, np.ndarray] = {}
        for episode in tqdm(
            local, "image codes", mininterval=1.0, leave=False, disable=not processes.main
        ):
            waiting[episode.key] = encode_frames(vqgan, episode.frames, processes.device)
            if sum(map(len, waiting.values())) > frames_in_memory:
                write_codes(pack, waiting)
                waiting = {}
        write_codes(pack, waiting)
        processes.barrier()
        pack.read_index()
        for episode in episodes:
            episode.codes = pack.rows(episode.key)
    except video.MachineFault as fault:
        fail(str(fault))


def encode_frames(vqgan: ImageTokenizer, frames: np.ndarray, device: torch.device) -> np.ndarray:
    """frames uint8 [T, S, S, 3] -> codes uint16 [T, N], 16 frames at a time"""
    parts = []
    for start in range(0, len(frames), 16):
        images = to_float(np.array(frames[start : start + 16]), device) * 2 - 1  # 16, 3, S, S
        parts.append(vqgan.encode(images))
    return torch.cat(parts).cpu().numpy().astype(np.uint16)


def write_codes(pack: video.Pack, waiting: dict[str, np.ndarray]) -> None:
    """Append arrays {key: codes} that no other process has written in the meantime"""
    if not waiting:
        return
    with pack.writing():
        for key, codes in waiting.items():
            if key not in pack.entries:
                pack.append(key, [codes.tobytes()])
