"""The one training loop of every stage; it knows optimisers and disks, and no model or task."""
