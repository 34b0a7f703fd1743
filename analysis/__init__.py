"""Looking at what was learned: report card and atlas of latent actions, charts of runs."""
