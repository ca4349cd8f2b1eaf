"""From a recipe to a plan, a run and an artefact."""
