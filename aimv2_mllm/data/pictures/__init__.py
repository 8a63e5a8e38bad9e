"""From an encoded picture to pixels: opened safely, decoded at the size needed, as a square
or in its own shape."""
