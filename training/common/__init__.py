"""What the trainings share: arguments, rows of a corpus, the exact trainer, model cards, signals."""
