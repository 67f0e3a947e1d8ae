"""What a caller chooses: policies, the learned scorer, the choice by token composition, and their files."""
