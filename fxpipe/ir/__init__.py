"""Values only, no algorithms: read this folder first."""
