"""Vision towers inside host toolkits, whose source stays as it is."""
