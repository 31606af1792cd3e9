"""Encoders trained on labels: protocols, losses, decoders on top, dense prediction, studies, ensembles of encoders."""
