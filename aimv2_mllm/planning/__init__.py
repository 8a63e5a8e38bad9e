"""What a recipe would take and all that would stop it, before a run: the dry run and the doctor."""
