"""Training of one causal LM: from a request (``TrainSpec``) to a model directory, through any kill."""
