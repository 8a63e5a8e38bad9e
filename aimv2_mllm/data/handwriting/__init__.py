"""The world that is shipped: sheets of handwritten digits with captions and questions, and
the part of it that nothing is trained on."""
