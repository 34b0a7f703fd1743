"""Networks small enough for a test, and what they read"""

import sequences

SMALL = dict(
    image_size=32,
    patch_size=8,
    dim=32,
    heads=4,
    dim_head=8,
    spatial_depth=1,
    temporal_depth=1,
    decoder_depth=1,
    quant_dim=8,
)
SEQUENCES = sequences.Sequences(
    sequences.train_tokenizer(["push the red block left"]), image_tokens=4
)
TEXTS = ["push left", "push the red block left", "block"]
