"""What every room uses: problems, progress, files, pictures, sheets."""
