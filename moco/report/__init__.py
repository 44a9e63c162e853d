"""What runs and evaluations wrote, as tables, pictures and one HTML page. Start at page.py."""
