"""What is read and written: settings, whole files, provenance, numbers beside their figures."""
