"""Small text classifiers, trained with fractional or dot-product attention."""
