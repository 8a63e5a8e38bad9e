"""What a recipe may say, and every mistake in it told; the YAML file read strictly."""
