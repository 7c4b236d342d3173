"""What a learner changed, on its way to the scorers: row deltas, versions, and who follows them."""
