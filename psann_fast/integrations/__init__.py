"""Other people's models and libraries."""
