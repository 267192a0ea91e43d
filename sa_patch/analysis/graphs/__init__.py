"""Attention as graphs: visible pairs, path lengths, clustering and spectra."""
