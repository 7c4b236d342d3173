"""`python -m engine ...`, which torchrun starts: `torchrun --nproc-per-node 2 -m engine train CONFIG --out DIR`."""

from engine.cli import main

main()
