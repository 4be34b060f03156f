{
  "algorithm": "Ed25519",
  "key": "e8949ff377b39979",
  "signature": "/8xO8RbTlu0VLPa6wzJ+Y7TGIbl3mqP+R39ft6NrZvq9W3+hABT3x3sxz20Y+FnWDFz9CWvacbIkGDszrcWbBw=="
}
