"""WHY a pattern behaves as it does: coverage, paths, spectra, propositions and attention maps."""
