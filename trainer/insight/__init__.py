"""Looking inside a finished model: what it attends to, and which tokens a prediction comes from."""
