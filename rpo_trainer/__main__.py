"""`python -m rpo_trainer` and `accelerate launch -m rpo_trainer` are `rpo-trainer`."""

from rpo_trainer.cli import main

if __name__ == "__main__":
    main()
