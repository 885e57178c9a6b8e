"""The dense decoder, the mixture of experts that shares its tensors, their names and their sizes."""
