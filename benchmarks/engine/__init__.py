"""What the engine costs: a decision, a step, scoring, and how well a latency table predicts."""
