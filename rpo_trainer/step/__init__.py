"""One training step: order, batch, attention, head, forward, log-probs."""
