"""The model side of the speech task: audio, features, encoders, steering, the projector, and what is measured."""
