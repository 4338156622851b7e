"""What is measured: speed, exactness, analysis of a model, and the demo."""
