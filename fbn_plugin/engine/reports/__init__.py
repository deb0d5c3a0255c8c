"""What is made of finished runs: AP of their weights, tables, pictures, a page of HTML."""
