"""Evaluation: how robust is a model, and can the answer be believed?"""
