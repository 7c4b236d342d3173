"""Learning while serving: events are joined to examples, train the model, and change scores by row deltas."""
