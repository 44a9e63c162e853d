"""Show runs and evaluations as tables, pictures and one HTML page. Start at page.py."""
