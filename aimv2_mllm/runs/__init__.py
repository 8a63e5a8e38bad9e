"""A recipe's stages in order, in a folder that can be left and taken up again, and its report."""
