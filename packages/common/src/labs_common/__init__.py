"""The ground floor of Foundation Labs: what every lab needs and no lab owns."""
